#!/usr/bin/env bash
# Sourced by scripts that call several commands: --help prints the header of the script, and a flag that it
# sets itself is refused in a line:  own="--output_dir --seed"; source "$(dirname "$0")/usage.sh" "$@"
set -euo pipefail

for word in "$@"; do
  flag=${word%%=*}
  flag=${flag//-/_}  # --output-dir is --output_dir
  if [ "$flag" = _h ] || [ "$flag" = __help ]; then
    sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"
    exit 0
  fi
  for name in ${own:-}; do
    if [ "$flag" = "${name//-/_}" ]; then
      echo "error: $(basename "$0") $word: it sets $name itself; bash $0 --help says what it takes" >&2
      exit 2
    fi
  done
done
