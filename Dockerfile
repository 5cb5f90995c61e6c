# The server, without torch. CPU:   docker build -t conveyor .
#                            CUDA:  docker build -t conveyor:gpu --build-arg EXTRA=gpu . && docker run --gpus all ... conveyor:gpu

FROM python:3.12-slim AS dependencies
# Which of pyproject.toml's extras to install: service, or gpu.
ARG EXTRA=service
WORKDIR /build
# Of the project only its list of dependencies, so that this layer outlives changes of the code.
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py "$EXTRA" > requirements.txt \
    && python -m venv /opt/conveyor \
    && /opt/conveyor/bin/pip install --no-cache-dir --disable-pip-version-check -r requirements.txt

FROM python:3.12-slim
COPY --from=dependencies /opt/conveyor /opt/conveyor
WORKDIR /app
COPY conveyor conveyor
COPY service service
COPY deploy/healthcheck.py healthcheck.py
# The root file system is meant to be read-only: compile now, not at every start. A volume mounted at /state takes its owner
# from the folder here, and keeps open sessions over a restart.
RUN /opt/conveyor/bin/python -m compileall -q . \
    && install -d -o 65532 -g 65532 /state
# CuPy makes this folder when it is imported, and fails where it cannot: its user has no home.
ENV PATH=/opt/conveyor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUPY_CACHE_DIR=/tmp/cupy \
    CONVEYOR_HOST=0.0.0.0 \
    CONVEYOR_PORT=8500 \
    CONVEYOR_REPOSITORY=/models
USER 65532:65532
EXPOSE 8500
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]
