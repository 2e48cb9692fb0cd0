"""The verb evaluate: what quantization costs the whole model, on real text, one decoder layer in memory at a time.

windows      text or token ids -> windows of equal length
skeleton     config.json -> the model's transformers class on the meta device, its layers filled one by one
weights      a checkpoint in any layout -> float tensors under the names of the unquantized model
int8         linears and routed experts that compute in INT8
streams      hidden states of several variants of the model, layer by layer
scores       logits -> perplexity, KL divergence, agreement
request      what the caller asks for; same_model: whether two checkpoints are one model
run          one evaluation under way
evaluation   all of it; results: what comes out; state: finished layers on disk
"""
