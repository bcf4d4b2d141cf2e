# syntax=docker/dockerfile:1
# The image that cluster jobs run in. The accelerator is chosen when it is built:
#   docker build --build-arg ACCELERATOR=cpu -t faculty:cpu .
#   docker build --build-arg ACCELERATOR=gpu -t faculty:gpu .
ARG RAY_VERSION=2.60.0
ARG ACCELERATOR=cpu
FROM rayproject/ray:${RAY_VERSION}-py311-${ACCELERATOR}

ARG UV_VERSION=0.13.8
WORKDIR /home/ray/faculty

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
