"""Other projects' weights under clipkit's names.

- `init`: what a run begins with, from a file; `files`: reading those files without executing them
- `openclip`: weights of OpenCLIP and OpenAI
"""
