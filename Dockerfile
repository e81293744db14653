# strank with all extras. CPU: docker build -t strank .
# CUDA: docker build --build-arg TORCH=cu126 -t strank:cuda .   and   docker run --gpus all ...
# docker run --rm -v "$PWD:/data" strank predict slide.svs --model model -o maps
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
# The builds of PyTorch: cpu, cu126, ...; its wheels bring their CUDA along.
ARG TORCH=cpu
ARG EXTRAS=all
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/${TORCH}
COPY pyproject.toml README.md LICENSE /strank/
COPY src /strank/src
RUN pip install --no-cache-dir "/strank[${EXTRAS}]"
RUN useradd --create-home strank
USER strank
WORKDIR /data
ENTRYPOINT ["strank"]
