# Two images of one file; both end in `afterglow`, with the repository's recipes in /workspace.
#
#   docker build --target cpu -t afterglow:cpu .
#   docker build --target gpu -t afterglow:gpu .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" afterglow:gpu train recipes/glow/qwen3-4b-base-openmath.yaml --dry_run
#
# torch's wheels bring their own CUDA libraries: the GPU image needs the driver of the host and nothing of CUDA besides.
# The sandbox for model-written code makes user namespaces, which the default profile of Docker forbids; where it cannot,
# it refuses to run code and says so (`afterglow doctor`). `--security-opt seccomp=unconfined` allows them.
FROM python:3.11-slim-bookworm AS base
ENV HF_HOME=/workspace/.cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 \
    PIP_NO_CACHE_DIR=1
# Triton and torch.compile call a C compiler; git stamps the manifest of a run. Debian's versions follow the base image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git libnuma1 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --upgrade "pip==26.3" "setuptools==77.0.3" "wheel==0.48.0" \
    && pip install --no-cache-dir torch==2.13.0
WORKDIR /workspace

FROM base AS cpu
COPY requirements/cpu.lock requirements/
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
ENTRYPOINT ["afterglow"]
CMD ["--help"]

FROM base AS gpu
COPY . .
# The project itself has no version to pin; pyproject.toml has those of what it pulls.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[vllm,deepspeed]"
ENTRYPOINT ["afterglow"]
CMD ["--help"]
