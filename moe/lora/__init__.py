"""LoRA on stacked experts: attached.py is what an experts module carries and computes with, lora.py puts it on and takes
it off, peft_files.py reads and writes PEFT's own files, tune.py chooses the experts that learn by themselves (ESFT), which tuned.py computes apart from the frozen ones."""
