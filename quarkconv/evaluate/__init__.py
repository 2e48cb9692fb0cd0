"""The verb evaluate: the cost of quantization on real text, one decoder layer in memory at a time.

windows      text or token ids -> windows of equal length
model_class  config.json -> the model's transformers class on the meta device
skeleton     that model; parameters: its layers filled and emptied one by one; forward: its forward pass, one layer at
             a time; expert_classes: how its classes keep routed experts
weights      a checkpoint in any layout -> float tensors under the names of the unquantized model; read_ahead: in order
int8         linears and routed experts that compute in INT8; int8_product: products of codes; int8_layer: the
             modules of one decoder layer
streams      one layer of several variants of the model; sums: their errors; routed: errors of single experts
hidden_states  those between two layers, on a GPU or in page-locked memory; calls: what layers take beside them
scoring      hidden states after the last layer -> logits; scores: logits -> perplexity, KL divergence, agreement;
             rows: the same on a GPU
request      options of the caller and their checks; same_model: whether two checkpoints are one model
record       the inputs of MoE layers as a file
layer_ops    element-wise parts of a layer on a GPU; norms, rotary, top_k, float_experts: parts of transformers'
             models that run on them
memory       what takes how much of a device's memory
runners      everything of both models but their layers, on each device
dequantize   int8 weights as floats; buffers: what no checkpoint holds
run          one evaluation under way
evaluation   all of it; results: its figures as data; state: finished layers on disk
"""
