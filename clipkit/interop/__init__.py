"""Other projects' weights under clipkit's names, and models of any origin.

- `load`: a model by its folder, file or name, ready to embed
- `init`: what a run begins with, from a file; `files`: reading those files without executing them
- `openclip`: weights of OpenCLIP and OpenAI
- `transformers`: CLIP and SigLIP of Hugging Face's package; `tokenizer_files`: the tokenizers in its folders
"""
