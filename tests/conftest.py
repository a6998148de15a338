"""Settings of every test: strict ranks and no hub."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
