# Two images from the locked packages (requirements/*.txt):
#   docker build --target cpu -t chameleon-ray:0.2.0-cpu .   the demo: docker run --network host chameleon-ray:0.2.0-cpu
#   docker build --target gpu -t chameleon-ray:0.2.0 .       for NVIDIA GPUs: see cluster_configs/kuberay.yaml
FROM python:3.11-slim AS wheel
WORKDIR /src
COPY requirements/dev.txt requirements/
RUN pip install --no-cache-dir --no-deps $(grep -E '^(build|pyproject_hooks)==' requirements/dev.txt) packaging setuptools==77.0.3
COPY pyproject.toml README.md LICENSE ./
COPY chameleon_ray chameleon_ray
COPY deployments deployments
COPY kernels kernels
COPY cluster_configs cluster_configs
RUN python -m build --wheel --no-isolation

# g++ compiles the CPU kernels; Triton needs a C compiler on GPUs. wget is for KubeRay's health checks.
FROM python:3.11-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends g++ libgomp1 libnuma1 wget && rm -rf /var/lib/apt/lists/*
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

FROM base AS cpu
COPY requirements/cpu.txt requirements/demo.txt /tmp/requirements/
# The CPU build of torch: from the default index where that has it, else from PyTorch's own index.
RUN torch=$(grep '^torch==' /tmp/requirements/cpu.txt) \
    && (pip install --no-cache-dir --no-deps "$torch" \
        || pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch") \
    && pip install --no-cache-dir --no-deps -r /tmp/requirements/cpu.txt -r /tmp/requirements/demo.txt
COPY --from=wheel /src/dist/*.whl /tmp/
RUN pip install --no-cache-dir --no-deps /tmp/*.whl && useradd --create-home ray
USER ray
WORKDIR /home/ray
RUN chameleon demo
EXPOSE 8000
CMD ["chameleon", "serve"]

FROM base AS gpu
# gpu.txt constrains all but the CUDA libraries, whose exact versions torch itself demands.
COPY requirements/gpu.txt /tmp/requirements/
COPY --from=wheel /src/dist/*.whl /tmp/
RUN pip install --no-cache-dir --constraint /tmp/requirements/gpu.txt "$(ls /tmp/*.whl)[gpu]" && useradd --create-home ray
USER ray
WORKDIR /home/ray
EXPOSE 8000
CMD ["ray", "start", "--head", "--block"]
