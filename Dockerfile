# For a GPU server with the NVIDIA container toolkit; torch's own wheels bring CUDA.
#
#   docker build -t chunk-grpo .
#   docker run --gpus all --shm-size 16g -p 8888:8888 -v "$PWD/runs:/opt/chunk_grpo_nb/runs" -v "$HOME/.cache/huggingface:/models" chunk-grpo
#   docker run --gpus all --shm-size 16g -v ... chunk-grpo accelerate launch --config_file data/launch/one_gpu.yaml \
#       -m chunk_grpo_nb.analysis.cli train --config data/launch/flux_dev_lora_80gb.yaml --out runs/flux
#
# Exercised: its commands, one by one, in a clean checkout with an environment of its own, on a CPU. NOT BUILT as an image.
FROM python:3.11-slim-bookworm

# git: a run's manifest names the commit. A compiler: torch.compile and DeepSpeed build what they need.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/chunk_grpo_nb
ENV HF_HOME=/models PIP_NO_CACHE_DIR=1 TOKENIZERS_PARALLELISM=false

COPY . .
ARG EXTRAS=notebooks,eval,track
RUN pip install -c ci/constraints.txt -e ".[${EXTRAS}]" \
    && git config --system --add safe.directory /opt/chunk_grpo_nb

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--allow-root", "--no-browser", "nbs"]
