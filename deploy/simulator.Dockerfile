# An image of the simulator, a vLLM look-alike: rehearses a fleet of containers without GPUs.
#   docker build -f deploy/simulator.Dockerfile -t tidegate-simulator .
# `tidegate-simulator` is its program; called as `vllm serve MODEL ...` it takes vLLM's flags.
FROM python:3.11-slim-bookworm AS build
COPY pyproject.toml README.md LICENSE CHANGELOG.md /src/
COPY protos /src/protos
COPY services /src/services
COPY deploy /src/deploy
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.11-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[simulator]" && ln -s "$(command -v tidegate-simulator)" /usr/local/bin/vllm
ENTRYPOINT ["tidegate-simulator"]
