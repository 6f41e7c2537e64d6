// What torch asks of a CUDA device, answered by one that is made of the host's memory. See simulated_gpu.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace at {

const Device GPU(DeviceType::CUDA, 0);

struct SimulatedGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard);

struct CUDAHooks final : CUDAHooksInterface {  // the name that torch looks for
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return GetAllocator(DeviceType::CPU); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

// The same elements, as a tensor of the other device; it keeps the storage of `of` alive.
Tensor seen_from(const Tensor& of, bool gpu) {
  auto* held = new Storage(of.storage());
  DataPtr data(held->mutable_data(), held, [](void* p) { delete static_cast<Storage*>(p); }, gpu ? GPU : Device(kCPU));
  Storage storage(Storage::use_byte_size_t(), held->nbytes(), std::move(data), nullptr, false);
  auto out = detail::make_tensor<TensorImpl>(std::move(storage), gpu ? DispatchKey::CUDA : DispatchKey::CPU, of.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(of.sizes(), of.strides(), of.storage_offset());
  return out;
}

// A tensor in the storage of `base`, of the dtype, sizes, strides and offset of `like`.
Tensor within(const Tensor& base, const Tensor& like) {
  auto out = detail::make_tensor<TensorImpl>(TensorImpl::VIEW, Storage(base.storage()), base.key_set(), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

void reshape(Tensor tensor, IntArrayRef sizes, IntArrayRef strides, int64_t offset) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
}

void set_storage(Tensor tensor, Storage storage) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
}

}  // namespace at

TORCH_LIBRARY(inrun_simulated_gpu, m) {
  m.def("to_cpu(Tensor of) -> Tensor", [](const at::Tensor& of) { return at::seen_from(of, false); });
  m.def("to_gpu(Tensor of) -> Tensor", [](const at::Tensor& of) { return at::seen_from(of, true); });
  m.def("within(Tensor base, Tensor like) -> Tensor", at::within);
  m.def("reshape(Tensor tensor, int[] sizes, int[] strides, int offset) -> ()", at::reshape);
  m.def("set_storage(Tensor tensor, Storage storage) -> ()", at::set_storage);
}
