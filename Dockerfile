# A model as a service:  docker build -t resnetlab .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -p 8000:8000 -v ./runs/mine:/model:ro resnetlab
# 6 GB, mostly PyTorch's CUDA. podman needs --format docker to build it; otherwise it leaves out the HEALTHCHECK. A stop waits for
# requests in progress: 10 s by docker's default, --stop-timeout 61 for the longest that the service allows.
FROM python:3.12-slim AS build
WORKDIR /build
RUN python3 -m pip install -q --target .tools 'uv>=0.13,<1'
COPY pyproject.toml uv.lock README.md LICENSE ./
COPY src ./src
RUN .tools/bin/uv sync --locked --no-dev --no-editable --extra serve

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 resnetlab
COPY --from=build /build/.venv /build/.venv
ENV PATH=/build/.venv/bin:$PATH PYTHONUNBUFFERED=1
USER resnetlab
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["resnetlab", "serve"]
CMD ["/model/model.safetensors", "--host", "0.0.0.0", "--port", "8000"]
