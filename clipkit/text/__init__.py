"""From captions to token ids, and to fewer of them.

- `tokenizer`: CLIP's byte-pair encoding
- `tokens`: CLIPA's eight ways to keep fewer image or text tokens
- `syntax`: the class of each word, for the reduction that keeps nouns first
"""
