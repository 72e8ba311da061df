"""Other projects' weights under clipkit's names.

- `openclip`: weights of OpenCLIP and OpenAI
"""
