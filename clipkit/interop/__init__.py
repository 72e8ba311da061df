"""Other projects' weights under clipkit's names, and models of any origin.

- `load`: a model by its folder, file or name, ready to embed
- `init`: what a run begins with, from a file; `files`: reading those files without executing them
- `openclip_models`: OpenCLIP's and OpenAI's models by file, folder or name; `openclip`: their weights;
  `openclip_config`: their configurations; `openclip_adapter`: those that run in OpenCLIP's code
- `transformers`: CLIP and SigLIP of Hugging Face's package; `tokenizer_files`: the tokenizers in its folders
"""
