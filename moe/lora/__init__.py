"""LoRA on stacked experts, and experts that learn alone.

attached.py is what an experts module carries and computes with, lora.py puts it on and takes it off, peft_files.py
reads and writes PEFT's own files. tune.py chooses the experts that learn by themselves (ESFT), tuned.py computes them.
"""
