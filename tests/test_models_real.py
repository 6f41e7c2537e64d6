"""Real models in real stacks: every trainable parameter scored, and the values those of the float64 oracle."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")
pytest.importorskip("peft")

from coverage_table import END, NOTES, README, START
from real_models import (
    CASES,
    LR,
    MORE,
    STACKS,
    VOCAB,
    B,
    Case,
    Norms,
    Stack,
    compare,
    double,
    error,
    logits,
    oracle,
    part,
    plain_tokens,
    prepare,
    sample_gradients,
    step,
    with_one_block,
)

import inrun

FORWARD_MODE = {
    "ViT": ["ViTEmbeddings"],
    "nn.LSTM": ["LSTM"],
    "experts as modules": ["Routed"],
    "F.linear(x, other.weight)": ["Borrowed"],
}


def test_the_readme_has_a_row_for_every_model_and_a_column_for_every_stack():
    """What its cells say is measured by `coverage_table.py`; here they are complete."""
    table, _, notes = README.read_text().partition(START)[2].partition(END)[0].strip().partition("\n\n")
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head == ["", *STACKS, "slow"] and set(rule) == {"---"}
    assert [row[0] for row in rows] == list(CASES)
    for name, *cells, slow in rows:
        assert len(cells) == len(STACKS) and set(cells) <= {"ok", "breaks", "-"}
        assert re.findall("`(.*?)`", slow) == FORWARD_MODE.get(name, [])
    assert notes.strip() == NOTES.strip()


@pytest.mark.parametrize("name", list(CASES))
def test_every_model(name):
    found, allowed, slow = compare(CASES[name], STACKS["float32"])
    assert found <= allowed
    assert slow == FORWARD_MODE.get(name, [])


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("name", list(MORE))
def test_more_models(name, method):
    """The README names them."""
    assert re.search(rf"\b{re.escape(name)}\b", re.sub(r"\s+", " ", README.read_text()))
    found, allowed, _ = compare(MORE[name], STACKS["float32"], method=method)
    assert found <= allowed


@pytest.mark.parametrize("name", ["Llama", "Qwen2-MoE", "ViT"])
@pytest.mark.parametrize("stack", [s for s in STACKS if s != "float32" and not STACKS[s].compiled])
def test_every_stack(name, stack):
    found, allowed, _ = compare(CASES[name], STACKS[stack])
    assert found <= allowed


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral", "ViT", "nn.MultiheadAttention"])
def test_a_tracked_step_takes_flash_attention(name):
    """The fused kernel and its backward, as plain training does."""
    case, stack = CASES[name], STACKS["SDPA"] if name != "nn.MultiheadAttention" else STACKS["float32"]
    called, optimizer, tracker = prepare(case, stack, check=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(called, optimizer, tracker, stack, case.batch(B, 1), case.batch(4, 2))
    ran = {event.key for event in profile.key_averages()}
    for kernel in ("flash_attention_for_cpu", "flash_attention_for_cpu_backward"):
        assert f"aten::_scaled_dot_product_{kernel}" in ran


@pytest.mark.parametrize(
    "name", ["T5", "nn.LSTM", "Mixtral", "Qwen2-MoE", "DeepSeek-V3", "ViT", "ResNet, eval mode", "Gemma"]
)
def test_deferred_methods_and_two_targets(name):
    """The secant over two targets, from what a step kept, is the inline values' mean over its two ends."""
    case = CASES[name]
    model = case.built()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    train, targets = case.batch(5, 1), {"a": case.batch(4, 2), "b": case.batch(3, 3)}
    losses = {k: lambda v=v: mean_loss(model, *v) for k, v in targets.items()}
    tracker = inrun.track(model, optimizer, "secant", validation=losses, through=case.through)
    before = copy.deepcopy(model)
    with tracker.step(range(5)) as one:
        mean_loss(model, *train).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = sample_gradients(plain(case, before), *train)
    for m, validation in enumerate(targets.values()):
        ends = [sample_gradients(plain(case, w), *validation) for w in (before, model)]
        direction = {n: LR / 2 * sum(row[n] for end in ends for row in end) for n in rows[0]}
        expected = torch.stack([sum((direction[n] * row[n]).sum() for n in row) for row in rows])
        assert error(one.values[:, m], expected) < 5e-4


HALF = ["nn.LSTM", "experts as modules", "ViT", "T5", "Mixtral", "nn.MultiheadAttention"]


@pytest.mark.parametrize(
    ("name", "stack"),
    [("F.linear(x, other.weight)", "bf16"), ("F.linear(x, other.weight)", "fp16 + GradScaler")]
    + [(name, "bf16") for name in HALF],
)
def test_what_a_step_kept_in_half_precision(name, stack):
    if name == "nn.LSTM" and torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no LSTM in bfloat16 for this processor")
    found, allowed, _ = compare(CASES[name], STACKS[stack], method="path")
    assert found <= allowed


@pytest.mark.parametrize(("stack", "method"), [("bf16", "first"), ("bf16", "path"), ("compiled", "first")])
def test_torchs_norms_within_a_forward_mode_pass(stack, method):
    """Their own forward derivatives are of another dtype than their outputs, and not to be captured."""
    case = Case(Norms, plain_tokens, through={"embed.weight": "", "hidden.weight": ""})
    found, allowed, slow = compare(case, STACKS[stack], method=method)
    assert found <= allowed
    assert slow == ["Norms"]


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_relative_position_bias_belongs_to_no_token_and_no_document(method):
    case = CASES["T5"]
    x, y = case.batch(5, 1)
    x = {name: ids[:, : y.shape[1]] for name, ids in x.items()}  # encoder and decoder of one length
    for layout in ({"tokens": y.shape[1]}, {"tokens": y.shape[1], "segments": torch.arange(6) * y.shape[1]}):
        model = case.built()
        tracker, optimizer = tracked(case, model, method)
        refused = pytest.raises(inrun.InRunError, match=r"SelfAttention \(T5Attention\): .* token by token")
        with refused, tracker.step(range(5), **layout):
            mean_loss(model, x, y).backward()
            optimizer.step()


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "experts as modules"])
def test_experts_by_documents_and_by_tokens(name, method):
    """Rows of tokens are told apart inside a mixture of experts: whole rows as documents are the samples, and tokens
    add up to them."""
    case, found = CASES[name], []
    x, y = case.batch(5, 1)
    tokens = y.shape[1]
    uneven = torch.tensor([0, 1, tokens + 2, 2 * tokens, 2 * tokens, 5 * tokens])
    layouts = [{"tokens": tokens, "segments": ends} for ends in (torch.arange(6) * tokens, uneven)]
    for layout in ({}, layouts[0], {"tokens": tokens}, layouts[1]):
        model = case.built()
        tracker, optimizer = tracked(case, model, method)
        with tracker.step(range(5), **layout) as one:
            mean_loss(model, x, y).backward()
            optimizer.step()
        found.append(one.values)
    assert found[2].shape == (5, tokens)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[2].sum(1), found[0], rtol=1e-4, atol=1e-6)
    parts = torch.segment_reduce(found[2].flatten(), "sum", offsets=uneven, initial=0)
    torch.testing.assert_close(found[3], parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["first", "path"])
def test_fused_experts_run_once(method):
    case = CASES["Mixtral"]
    model, (x, y) = case.built(), case.batch(5, 1)
    tracker, optimizer = tracked(case, model, method)
    calls, experts = [], model.model.layers[0].mlp.experts
    with tracker.step(range(5)):  # whose check runs the model once more
        mean_loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with tracker.step(range(5)) as one:
        experts.act_fn.register_forward_hook(lambda *_: calls.append(1))
        mean_loss(model, x, y).backward()
        optimizer.step()
    assert one.values.shape == (5,) and len(calls) == 1


@pytest.mark.parametrize("name", ["T5", "Mixtral", "Qwen2-MoE"])
def test_one_value_for_each_validation_sample_is_refused_where_rows_are_not_samples(name):
    case = CASES[name]
    with pytest.raises(inrun.InRunError, match=r"pairwise: expected layers that compute each row .*(gate|relative)"):
        tracked(case, case.built(), "first", pairwise=["a", "b"])


def tracked(case, model, method, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    validation = case.batch(4, 2)
    losses = {"validation": lambda: mean_loss(model, *validation)}
    return inrun.track(model, optimizer, method, validation=losses, through=case.through, **options), optimizer


def mean_loss(model, x, y):
    return nn.functional.cross_entropy(logits(model, x).flatten(0, -2), y.flatten())


def plain(case, model):
    """An untracked model with these weights."""
    fresh = case.built()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_batch_norm_in_training_scores_what_flows_through_a_samples_rows():
    """The oracle runs each module twice, and lets gradients reach its parameters only through the sample's rows."""
    case = CASES["ResNet, eval mode"]
    model = case.built().train()
    train, validation = case.batch(5, 1), case.batch(4, 2)

    def through_rows(model, x, y, b):
        model = copy.deepcopy(model).double()
        params = {n: p for n, p in model.named_parameters()}

        def only_row(module, args, out):
            frozen = {n: p.detach() for n, p in module.named_parameters()}
            other = module.forward_of(frozen, *args)
            mask = (torch.arange(len(out)) == b).view(-1, *[1] * (out.dim() - 1))
            return torch.where(mask, out, other)

        for module in model.modules():
            if module._parameters:
                module.forward_of = lambda p, *a, m=module: call_without_hooks(m, p, a)
                module.register_forward_hook(only_row)
        loss = mean_loss(model, double(x), y)
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def call_without_hooks(module, values, args):
        before = dict(module._parameters)
        module._parameters.update(values)
        try:
            return type(module).forward(module, *args)
        finally:
            module._parameters.update(before)

    plain_model = copy.deepcopy(model).double()
    mean_loss(plain_model, double(validation[0]), validation[1]).backward()
    direction = {n: LR * p.grad for n, p in plain_model.named_parameters()}
    rows = [through_rows(model, *train, b) for b in range(5)]
    expected = torch.stack([sum((direction[n] * row[n]).sum() for n in row) for row in rows])

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer)
    statistics = [b.clone() for b in copy.deepcopy(model).buffers()]
    values = step(model, optimizer, tracker, STACKS["float32"], train, validation)
    assert error(values, expected) < 2e-4
    # Two forwards, and so two updates of the running statistics: the tracker adds none.
    assert {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")} == {2}
    assert any(not torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_with_a_changing_batch(whole):
    """One graph each for validation, the checked step and later steps, and one more once the batch size is open."""
    case, stack = CASES["Llama"], STACKS["compiled" if whole else "compiled blocks"]
    case = with_one_block(case) if whole else case
    graphs = CompileCounterWithBackend("aot_eager")
    called, optimizer, tracker = prepare(case, stack, backend=graphs)
    counts = []
    for batch in (5, 5, 4, 7):
        train, validation = case.batch(batch, 1), case.batch(4, 2)
        expected = oracle(copy.deepcopy(tracker.model), train, validation)
        assert error(step(called, optimizer, tracker, stack, train, validation), expected) < 2e-4
        counts.append(graphs.frame_count)
    assert counts[2] == counts[-1] <= 4 * (1 if whole else 2)


WHOLE = ["GPT-2", "Llama + PEFT LoRA", "BERT", "T5", "ViT"]
TWO_BLOCKS = ["GPT-2", "Qwen2-MoE"]


@pytest.mark.parametrize(
    ("name", "stack"),
    [(name, STACKS["compiled"]) for name in WHOLE]
    + [("Mixtral", Stack(compiled="whole", reentrant=False))]
    + [(name, STACKS["compiled blocks"]) for name in TWO_BLOCKS],
)
def test_every_kind_of_rule_compiled(name, stack):
    """The training forward in one graph, or one for all blocks; validation is outside of it, and nothing is checked."""
    case, graphs = CASES[name], CompileCounterWithBackend("aot_eager")
    case = with_one_block(case) if stack.compiled == "whole" else case
    called, optimizer, tracker = prepare(case, stack, backend=graphs, check=False)
    train, validation = case.batch(B, 1), case.batch(4, 2)
    expected = oracle(copy.deepcopy(tracker.model), train, validation)
    with tracker.validation(), torch.compiler.set_stance("force_eager"):
        mean_loss(called, *validation).backward()
    with tracker.step(range(B)) as one:
        mean_loss(called, *train).backward()
        optimizer.step()
    assert error(one.values, expected) < 2e-4
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("name", "fullgraph"), [("F.linear(x, other.weight)", True), ("experts as modules", False)])
def test_compiled_forward_mode(name, fullgraph):
    """Captured whole; or, where a graph cannot have it, run outside of it, whole as well."""
    found, allowed, _ = compare(CASES[name], STACKS["compiled"], fullgraph)
    assert found <= allowed


def test_torch_captures_no_lstm_but_experts_that_are_not_scored():
    """As the README says where it says that a graph breaks."""
    x, _ = CASES["nn.LSTM"].batch(B, 1)
    untracked = [
        torch.compile(CASES[n].built(), backend="eager", fullgraph=True) for n in ("nn.LSTM", "experts as modules")
    ]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        untracked[0](x)
    assert untracked[1](x).shape == (B, x.shape[1], VOCAB)


def test_an_outer_module_scores_only_what_it_encloses():
    model = CASES["F.linear(x, other.weight)"].built()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="expected a module that encloses 'embed', got 'hidden'"):
        inrun.track(model, optimizer, through={"embed.weight": "hidden"})
    with pytest.raises(ValueError, match="expected the name of a module, got 'nothing'"):
        inrun.track(model, optimizer, through={"embed.weight": "nothing"})
    tracker = inrun.track(model, optimizer)
    x, y = CASES["F.linear(x, other.weight)"].batch(5, 1)
    with pytest.raises(inrun.InRunError, match=r"through=\{parameter: the module that does\}"):
        step(model, optimizer, tracker, STACKS["float32"], (x, y), (part(x, slice(2)), y[:2]))


def test_a_gated_norm_keeps_its_gate():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x, gate=None):
            x = nn.functional.rms_norm(x, (8,)) * self.weight
            return x if gate is None else x * gate.sigmoid()

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(5, 3, 8)
    expected = model(x, gate=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x, gate=x).square().sum())
    with tracker.step(range(5)) as one:
        out = model(x, gate=x)
        out.square().sum().backward()
        optimizer.step()
    assert torch.equal(out, expected)
    # Training and validation are the same samples, so that the values add up to lr |g|^2.
    torch.testing.assert_close(one.values.sum(), LR * model.weight.grad.square().sum())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_forward_mode_of_several_targets(backend):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.GroupNorm(1, 6), nn.PReLU(), nn.Linear(8, VOCAB))
        called = torch.compile(model, backend=backend) if compiled else model
        x, y, others = torch.randint(VOCAB, (5, 6)), torch.randint(VOCAB, (5, 6)), torch.randint(VOCAB, (2, 2, 3, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        losses = {n: lambda pair=pair, m=model: mean_loss(m, *pair) for n, pair in zip("ab", others, strict=True)}
        tracker = inrun.track(model, optimizer, validation=losses)
        for _ in range(2):  # the first step is the checked one
            with tracker.step(range(5)) as one:
                mean_loss(called, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(one.values)
    torch.testing.assert_close(*found)
