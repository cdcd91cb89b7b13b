"""Sparse training of a model that is not ours: a small GPT-2 with SparseTrainer.

Run it: python examples/sparse_gpt2.py   (about two minutes on two CPU cores)
"""

from transformers import GPT2Config, GPT2LMHeadModel

from hf_circuit_sparsity import (
    SparseTrainer,
    SparseTrainingArguments,
    build_corpus,
    pack_dataset,
    train_tokenizer,
)

corpus = build_corpus()
tokenizer = train_tokenizer(corpus["train"])
blocks = pack_dataset(corpus, tokenizer, block_size=128)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(tokenizer), n_embd=128, n_layer=2, n_head=8, n_positions=128)
)
arguments = SparseTrainingArguments(
    "runs/sparse_gpt2",
    target_density=1 / 16,
    max_steps=600,
    per_device_train_batch_size=16,
    logging_steps=50,
    save_strategy="no",
    report_to="none",
)
trainer = SparseTrainer(
    model,
    arguments,
    train_dataset=blocks["train"],
    eval_dataset=blocks["validation"].select(range(256)),
    processing_class=tokenizer,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
