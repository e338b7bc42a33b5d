"""The tokenizer deployment: a Serve adapter around services.text."""
