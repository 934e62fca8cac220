"""Models in the files of Hugging Face: loading, the start of sparse attention, and saving.

`config` translates config.json by the tables of `keys`, and `names` says which tensor is which
parameter. `load` goes from a folder to a model: headers are checked first, and then each parameter
is read part by part (`read`) or made (`warm_start`). `write` goes back.
"""

from fsa_jax.pretrained.load import load_pretrained as load_pretrained
from fsa_jax.pretrained.write import save_pretrained as save_pretrained
