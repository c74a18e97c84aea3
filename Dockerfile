# moe2gguf with llama.cpp for the CPU. From a clone:
#   docker build -t moe2gguf .
#   docker run --rm -v "$PWD:/models" moe2gguf convert SmolLM2-135M-Instruct moe.gguf --experts 8
# The build compiles llama.cpp for the processor that it runs on; build it again on another kind of machine.
FROM python:3.13-slim

# what pip compiles llama.cpp with; libgomp1 is needed to run it
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake git libgomp1 \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir '/src[run,report]'

WORKDIR /models
ENTRYPOINT ["moe2gguf"]
