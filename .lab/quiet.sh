#!/bin/bash
# run CMD when the machine is idle
while [ "$(ps -eo pcpu,comm --sort=-pcpu | awk 'NR>1 && $1>60 && $2!="ps"' | wc -l)" -gt 0 ] && [ "$(awk '{print ($1>1.2)}' /proc/loadavg)" = 1 ]; do sleep 5; done
exec "$@"
