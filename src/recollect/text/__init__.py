"""Plain text as training data: tokenizers, documents, the token store and packed rows."""
