# docker build -t flatlm .
# docker run --rm -it --gpus all --ipc=host -v "$PWD/data:/flatlm/data" -v "$PWD/out:/flatlm/out" flatlm \
#     python train.py config/gpt2_124m.py
# Without a GPU leave out --gpus all. --ipc=host: ranks on one machine share memory through /dev/shm.
FROM python:3.12-slim
# g++: torch.compile needs a compiler; git: a run's log names its commit
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /flatlm
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "train.py", "--help"]
