"""BlockFlow: modular DNN inference over shared blocks."""

__version__ = "0.1.0"
