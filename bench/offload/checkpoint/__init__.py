"""`headgate bench offload --rows checkpoint`: from a checkpoint on disk to tokens, beside llama.cpp and accelerate.

| file | holds |
|---|---|
| make.py | the checkpoint: random weights of Qwen3-30B-A3B's shape, in shards, made once |
| gguf_file.py | the same model as a GGUF file |
| files.py | what of a file is in the page cache; into it and out of it; the disk's rate |
| processes.py | a job in a process of its own: memory, processor time, bytes |
| jobs.py | what Headgate does in such a process |
| rivals.py | what llama.cpp and accelerate do there |
| held.py | the memory that a rival's files may take |
| parts.py | which jobs make a part of the table |
| rows.py | the table |
"""
