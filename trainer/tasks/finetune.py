"""Fine-tuning a pretrained causal language model, on text or on conversations: training, then a folder to use.

The same loop as pretraining. What differs is where weights come from (`model.pretrained`), which of them train
(`model.lora`), and which tokens are targets (data.source=chat: the assistant's). 
"""
