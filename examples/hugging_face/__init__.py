"""Any causal language model of Hugging Face's transformers, trained with Muon."""
