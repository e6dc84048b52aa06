"""`headgate serve MODEL`: an OpenAI-compatible server, on transformers' own handlers, over a model whose experts are
elsewhere.

| file | holds |
|---|---|
| command.py | options; what is loaded, said and closed; the process that listens |
| connections.py | connections that keep us waiting |
| app.py | who is let in, how many, and what goes wrong |
| bodies.py | what a request may hold |
| managers.py | answers: one after another, or together by continuous batching |
| answer.py | tokens of one answer into text for its client |
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
