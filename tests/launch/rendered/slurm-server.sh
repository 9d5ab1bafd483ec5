#!/bin/bash
# Written by: afterglow launch slurm tool_rlvr/qwen3-0.6b-gsm8k.yaml --nodes 2 --server_nodes 1 --vllm_mode server --vllm_tensor_parallel_size 2
# 2 node(s) x 8 GPU(s) x 16 row(s) x 8 accumulated = 2048 rows in a step
# What your cluster wants besides (partition, account, time) goes on the command line: sbatch --time=24:00:00 ... FILE
# Submit it in the folder that the recipe's paths start from; all nodes see it. The recipe is checked by `--dry_run`.
#SBATCH --job-name=qwen3-0-6b-gsm8k
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# Two minutes before the time limit the job goes back into the queue, and on from its last checkpoint when it returns.
trap 'echo "time limit: queued again" >&2; scontrol requeue "$SLURM_JOB_ID"' USR1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000 * 3))
export head port

# Between single quotes stands what only the node knows, such as its rank.
server=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
export server
srun --nodes=1 --ntasks=1 --relative=2 --cpu-bind=none \
  bash -c 'exec "$@" --port "$((port + 1))"' serve \
  afterglow serve tool_rlvr/qwen3-0.6b-gsm8k.yaml --vllm_mode server --vllm_tensor_parallel_size 2 --host 0.0.0.0 &
server_step=$!
srun --nodes=2 --ntasks=2 --relative=0 --kill-on-bad-exit=1 --cpu-bind=none \
  bash -c 'exec "$@" \
  --vllm_server_base_url "http://$server:$((port + 1))" --vllm_group_port "$((port + 2))" \
  --machine_rank "$SLURM_PROCID" --main_process_ip "$head" --main_process_port "$port"' train \
  afterglow train tool_rlvr/qwen3-0.6b-gsm8k.yaml --vllm_mode server --vllm_tensor_parallel_size 2 --accelerate_config fsdp2 --num_processes 16 --num_machines 2 &
train_step=$!

status=0
wait -n "$train_step" "$server_step" || status=$?
if kill -0 "$train_step" 2>/dev/null; then
  echo "the vLLM server ended before the training; the same job goes on from the last checkpoint" >&2
  status=1
fi
kill "$train_step" "$server_step" 2>/dev/null || true
wait
exit "$status"
