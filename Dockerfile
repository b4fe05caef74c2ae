# The image of the agent (FOR=agent: with libvirt's client library) or of `virtbus react` (FOR=react: with the control
# planes' clients): Python, virtbus in a virtual environment, and nothing to build with. Builds with docker, podman
# and buildah (with buildah and podman add --format docker, which keeps the health check):
#
#   buildah build --format docker --tag virtbus:0.1.0 .
#
# The base is Debian 13 with Python 3.13. Renew the digest with the tag.
ARG FOR=agent
ARG BASE=docker.io/library/python:3.13-slim-trixie@sha256:ffb752e139c0a19692a43af8d8523b274222dd68eebad5d583b45c2201c6e30a

FROM ${BASE} AS base
# Debian's packages as they were on a day, so that the image can be built again: --build-arg SNAPSHOT=20261130T000000Z.
# Without it they are today's.
ARG SNAPSHOT
ARG ARCHIVE=http://snapshot.debian.org/archive
RUN test -z "${SNAPSHOT}" || { . /etc/os-release \
 && rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* \
 && for each in "debian/${SNAPSHOT} ${VERSION_CODENAME}" "debian/${SNAPSHOT} ${VERSION_CODENAME}-updates" \
      "debian-security/${SNAPSHOT} ${VERSION_CODENAME}-security"; \
    do echo "deb [check-valid-until=no] ${ARCHIVE}/${each} main"; done >/etc/apt/sources.list; }

FROM base AS build
ARG FOR
# For a package index of your own: --build-arg PIP_INDEX_URL=… and its CA, which must be in the build.
ARG PIP_INDEX_URL
ARG PIP_CERT
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# Debian's packages are pinned by SNAPSHOT, not one by one. The words of the last line are meant to split.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
 && apt-get install -y --no-install-recommends binutils gcc libc6-dev libvirt-dev pkg-config \
      $(python3 -c 'import sys; print("" if sys.executable.startswith("/usr/local") else "python3-dev python3-venv")')
WORKDIR /build
# The dependencies first: they change less often than we do. Every file's hash is pinned, and what is built
# from source (libvirt-python) is built with pinned tools.
COPY .docker ./.docker
RUN python3 -m venv tool \
 && tool/bin/pip install --require-hashes --requirement .docker/build.txt \
 && tool/bin/pip wheel --wheel-dir wheels --require-hashes --no-build-isolation --requirement .docker/requirements-${FOR}.txt
COPY pyproject.toml README.md LICENSE ./
COPY .packaging/readme.py .packaging/readme.py
COPY schemas schemas
COPY virtbus virtbus
RUN tool/bin/pip wheel --wheel-dir wheels --no-deps --no-build-isolation . \
 && python3 -m venv --without-pip /opt/virtbus \
 && tool/bin/pip --python /opt/virtbus/bin/python install --no-index --no-deps wheels/*.whl \
 && find /opt/virtbus -name '*.so*' -type f -exec strip --strip-unneeded {} +

FROM base AS runtime
ARG FOR
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=https://github.com/virtbus/virtbus
LABEL org.opencontainers.image.title="virtbus" \
      org.opencontainers.image.description="Every guest I/O error that libvirt reports, as a durable CloudEvent" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates \
      $(test "${FOR}" = react || echo libvirt0) \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old \
 # No installer: what runs here can't fetch more.
 && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
      /usr/lib/python3*/ensurepip /usr/share/python-wheels /usr/lib/python3/dist-packages/pip* /usr/bin/apt* /usr/lib/apt \
 && find / -xdev -perm /6000 -type f -exec chmod a-s {} + \
 # A name for the uid, for people; libvirtd looks for one on its own side.
 && echo 'virtbus:x:65532:' >> /etc/group \
 && echo 'virtbus:x:65532:65532:virtbus:/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
 && mkdir -p /etc/virtbus /var/lib/virtbus /run/virtbus \
 && chown 65532:65532 /var/lib/virtbus /run/virtbus \
 && chmod 0700 /var/lib/virtbus
COPY --from=build /opt/virtbus /opt/virtbus
# The root file system may be read-only; what is written goes to /var/lib/virtbus, /run/virtbus and /tmp.
ENV PATH=/opt/virtbus/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 65532:65532
VOLUME ["/var/lib/virtbus"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["virtbus"]

FROM runtime AS agent
EXPOSE 9466/tcp
# The agent answers on its control socket, whether the broker is there or not. Kubernetes has its own probes.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15s CMD ["virtbus", "status", "--json"]
CMD ["run"]

# `virtbus react` has no control socket: its health is asked for over HTTP (react.listen). It needs `--with NAME`.
FROM runtime AS react
EXPOSE 9467/tcp
HEALTHCHECK NONE
CMD ["react"]

# hadolint ignore=DL3006
FROM ${FOR}
