# The image of the demo. docker-compose.yml has the commands that run in it.
FROM python:3.13.7-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Build in another folder than the demo runs in: there the source of pg_layer would hide the installed
# package, whose migrations are in another place.
WORKDIR /src
COPY pyproject.toml README.md LICENSE pg_layer_pytest.py ./
COPY pg_layer pg_layer
COPY migrations migrations
RUN pip install ".[demo]" && rm -rf /src

RUN useradd --system --no-create-home demo
USER demo
WORKDIR /app
COPY example example
ENV DJANGO_SETTINGS_MODULE=example.settings
