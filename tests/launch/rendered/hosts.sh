#!/bin/bash
# Written by: afterglow launch hosts tool_rlvr/qwen3-0.6b-gsm8k.yaml --hosts alpha,beta.example --gpus_per_node 4 --run_name 'it'"'"'s 2'
# 2 node(s) x 4 GPU(s) x 16 row(s) x 8 accumulated = 1024 rows in a step
# Run it in the folder that the recipe's paths start from, from the activated environment. Each host sees both under
# the same paths and answers to ssh without a password.
set -euo pipefail

hosts=(alpha beta.example)
steps=()
trap 'kill "${steps[@]}" 2>/dev/null || true' EXIT

train='afterglow train tool_rlvr/qwen3-0.6b-gsm8k.yaml --run_name '"'"'it'"'"'"'"'"'"'"'"'s 2'"'"' --accelerate_config fsdp2 --num_processes 8 --num_machines 2'
train+=" --main_process_ip ${hosts[0]} --main_process_port 29500"
for rank in "${!hosts[@]}"; do
  # -tt: what runs there ends when this script does.
  ssh -tt -o BatchMode=yes "${hosts[rank]}" \
    "cd $(printf %q "$PWD") && export PATH=$(printf %q "$PATH") && exec $train --machine_rank $rank" </dev/null &
  steps+=($!)
done

# The first that fails ends all: the others would wait for it.
for _ in "${steps[@]}"; do
  status=0
  wait -n "${steps[@]}" || status=$?
  if [ "$status" -ne 0 ]; then
    echo "a host ended with code $status; the same script goes on from the last checkpoint" >&2
    exit "$status"
  fi
done
