# scale-rae serve, in two targets:
#   docker build --target cuda --tag scale-rae:cuda .
#   docker build --target cpu  --tag scale-rae:cpu  --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# TORCH_INDEX is the package index of PyTorch's CPU builds. Without it the CPU image works too, but contains CUDA's libraries.
# Run it with a key, which a server on all interfaces requires:
#   docker run --env SCALE_RAE_API_KEY=… --publish 127.0.0.1:8000:8000 scale-rae:cpu

FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/scale-rae
ENV PATH=/opt/scale-rae/bin:$PATH
COPY constraints.txt ./
# PyTorch is the largest layer, and changes least. constraints.txt pins all versions; of one version, pip takes the build with a
# local label, as in 2.13.0+cpu.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY scale_rae scale_rae
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"

FROM python:3.12-slim AS cpu
RUN useradd --create-home --uid 10001 scale-rae && mkdir /models && chown scale-rae /models
COPY --from=build /opt/scale-rae /opt/scale-rae
# Downloaded models and all caches are in the volume /models; the rest of the file system can be read-only.
ENV PATH=/opt/scale-rae/bin:$PATH HF_HOME=/models XDG_CACHE_HOME=/models/cache PYTHONUNBUFFERED=1
USER 10001
WORKDIR /tmp
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# The server finishes what it draws before it stops.
STOPSIGNAL SIGTERM
ENTRYPOINT ["scale-rae", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model-path", "shapes"]

FROM cpu AS cuda
USER 0
# Triton compiles its launchers with the system's C compiler, of any version.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/models/cache/triton TORCHINDUCTOR_CACHE_DIR=/models/cache/inductor
USER 10001
CMD ["--device", "cuda"]
