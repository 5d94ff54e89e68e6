# An image with the command fgsm and PyTorch for the CPU:
#
#     docker build -t fgsm .
#     docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" fgsm generate digits
#
# With CUDA: on PyPI, torch for Linux is the CUDA version.
#
#     docker build -t fgsm-cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#     docker run --rm --gpus all -v "$PWD:/data" --user "$(id -u):$(id -g)" fgsm-cuda generate digits
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# First and alone, so that a change of the package does not download it again.
RUN pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX"

COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY pipeline /src/pipeline
RUN pip install --no-cache-dir "/src[s3,timm,transformers]"

# Any user may write its caches there: a container is often run as a user that it does not know.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["fgsm"]
