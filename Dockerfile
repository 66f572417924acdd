# CPU:  docker build -t upstep-fast .
# GPU:  docker build -t upstep-fast --build-arg TORCH_INDEX=https://pypi.org/simple .
# GPU, with the compiled CUDA ops (nvcc is in the base):
#       docker build -t upstep-fast --build-arg TORCH_INDEX=https://pypi.org/simple \
#           --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
# run:  docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" upstep-fast adapt --model demo --data photos/ --out adapted/
#       GPU: add --gpus all

ARG BASE=python:3.12-slim

FROM ${BASE} AS python
# images of CUDA have no Python
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null \
    || (apt-get update && apt-get install --yes --no-install-recommends python3-venv python3-dev && rm -rf /var/lib/apt/lists/*)

FROM python AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=peft,report
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv \
    && pip install --index-url ${TORCH_INDEX} 'torch>=2.11' torchvision \
    && pip install 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in CMakeLists.txt LICENSE README.md ./
COPY csrc csrc
COPY kernels kernels
COPY upstep_fast upstep_fast
RUN pip install --no-build-isolation ".[${EXTRAS}]" && pip uninstall --yes cmake ninja pybind11

FROM python
COPY --from=build /opt/venv /opt/venv
# a home that any --user can write its caches to
RUN useradd --create-home --shell /usr/sbin/nologin upstep && chmod 1777 /home/upstep
ENV PATH=/opt/venv/bin:$PATH HOME=/home/upstep PYTHONUNBUFFERED=1
USER upstep
WORKDIR /work
ENTRYPOINT ["upstep-fast"]
CMD ["--help"]
