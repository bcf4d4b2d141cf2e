# syntax=docker/dockerfile:1
# The images of docs/cluster.md. The accelerator is chosen when it is built:
#   docker build --build-arg ACCELERATOR=cpu -t faculty:cpu .
#   docker build --build-arg ACCELERATOR=gpu -t faculty:gpu .
#   docker build --target mlflow -t faculty:mlflow .      # the tracking server of docker-compose.yaml
ARG RAY_VERSION=2.60.0
ARG ACCELERATOR=cpu
ARG UV_VERSION=0.13.8

# MLflow's server, with the drivers of PostgreSQL and S3: neither Ray nor torch.
FROM python:3.11-slim AS mlflow
ARG UV_VERSION
COPY conf/cluster/mlflow.lock /tmp/mlflow.lock
RUN python -m pip install --no-cache-dir "uv==${UV_VERSION}" \
    && uv pip install --system --no-cache --require-hashes -r /tmp/mlflow.lock \
    && useradd --create-home mlflow
USER mlflow
WORKDIR /home/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]

# What cluster jobs run in: head, workers, and whoever submits.
FROM rayproject/ray:${RAY_VERSION}-py311-${ACCELERATOR} AS faculty
ARG UV_VERSION
WORKDIR /home/ray/faculty

# A new volume that is mounted here belongs to the user that jobs run as.
USER root
RUN install -d -o ray -g users /shared
USER ray

# The lock first: a change of the code alone does not install the packages again.
COPY --chown=ray:users requirements.lock ./
RUN python -m pip install --no-cache-dir "uv==${UV_VERSION}" \
    && uv pip install --python "$(which python)" --no-cache --require-hashes -r requirements.lock

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users pipeline ./pipeline
COPY --chown=ray:users jobs ./jobs
COPY --chown=ray:users conf ./conf
RUN uv pip install --python "$(which python)" --no-cache --no-deps --editable . \
    && faculty --help > /dev/null

# No entry point: Ray's operators start `ray` in this image, `docker run faculty:cpu faculty run -c …` a run.
CMD ["faculty", "--help"]
