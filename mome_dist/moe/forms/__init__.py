"""Forms of an expert: its tensors, and what is computed of them; `mome_dist.moe.forms.registry` lists them."""
