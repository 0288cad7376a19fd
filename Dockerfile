# docker build -t hermes-router .
# docker run -p 127.0.0.1:8319:8319 -v hermes:/data -e GROQ_API_KEY hermes-router
# For several machines: docker buildx build --platform linux/amd64,linux/arm64 -t ... --push .

FROM python:3.12-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
# hadolint ignore=DL3064  # a folder, no secret
ENV PATH=/opt/venv/bin:$PATH TIKTOKEN_CACHE_DIR=/opt/tiktoken
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
# The vocabulary is baked in, so that no container downloads it. Without it the router
# estimates tokens from bytes, so a build without a network goes on.
RUN mkdir -p "$TIKTOKEN_CACHE_DIR" \
    && (timeout 120 python -c "import tiktoken; tiktoken.get_encoding('o200k_base')" \
        || echo "tiktoken's vocabulary could not be fetched; tokens will be estimated")

FROM python:3.12-slim
LABEL org.opencontainers.image.title="hermes-router" \
      org.opencontainers.image.licenses="MIT"
# 1000 is the user that Hugging Face Spaces run as; Kubernetes believes only a number not to be root.
RUN useradd --uid 1000 --create-home router \
    && install -d -o router -g router -m 700 /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/tiktoken /opt/tiktoken
COPY LICENSE router.py hr /app/
RUN ln -s /app/hr /usr/local/bin/hr # docker exec ... hr status
# hadolint ignore=DL3064  # a folder, no secret
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    PYTHON=/opt/venv/bin/python \
    TIKTOKEN_CACHE_DIR=/opt/tiktoken \
    HOST=0.0.0.0 \
    PORT=8319 \
    HR_HOME=/data
WORKDIR /app
# Compiled once: what a container compiles at its start is lost with it. Python's own modules come
# without bytecode in this image. The hash holds whatever a builder does to the files' times.
RUN python -m compileall -q --invalidation-mode checked-hash router.py \
    && PYTHONDONTWRITEBYTECODE='' python -c "import router, sqlite3, tiktoken"
USER 1000
VOLUME /data
EXPOSE 8319
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "router"]
CMD ["serve"]
