"""What `afterglow doctor` starts in each of several processes: one all-reduce, checked."""

import sys
from datetime import timedelta


def main() -> None:
    """Add the ranks up over the backend that the first argument names."""
    import torch
    import torch.distributed as dist

    backend = sys.argv[1]
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    device = torch.device("cuda", dist.get_rank()) if backend == "nccl" else torch.device("cpu")
    total = torch.full((1,), float(dist.get_rank()), device=device)
    dist.all_reduce(total)
    world = dist.get_world_size()
    if world < 2 or total.item() != world * (world - 1) / 2:
        raise SystemExit(f"Error: the sum over {world} ranks is {total.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
