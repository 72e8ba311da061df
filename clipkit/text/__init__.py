"""From captions to token ids, and to fewer of them.

- `tokenizer`: what every tokenizer has, and CLIP's byte-pair encoding
- `wordpiece`: BERT's WordPiece, for CLIPA-v2's towers
- `sentence_piece`: SentencePiece, for SigLIP's towers
- `vocabulary`: the tokenizer that a model names, with its vocabulary's file
- `tokens`: CLIPA's eight ways to keep fewer image or text tokens
- `syntax`: the class of each word, for the reduction that keeps nouns first
"""
