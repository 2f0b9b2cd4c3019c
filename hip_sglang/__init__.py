"""HiP attention as an out-of-tree plugin for SGLang."""
