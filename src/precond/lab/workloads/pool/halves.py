"""Which tasks of the pool are for development, and which are locked.

On the development half anything may be tried. The locked half is run for a final table alone: nothing in the library is chosen, tuned or
changed by what it shows. A task never moves from the locked half to the other; one that was looked at for any other reason is replaced.
"""

DEVELOPMENT = (
    "diabetes, raw",
    "mixed table, embeddings, regression",
    "deep autoencoder, digits",
    "variational autoencoder, digits",
    "conv net, digits",
    "ResNet with BN, shapes",
    "vision transformer, digits",
    "GPT, code",
    "Llama, English",
    "LSTM, code",
    "PINN, Poisson",
    "PINN, Burgers",
    "collaborative filtering, ratings",
    "conv net tuned to new digits",
)

LOCKED = (
    "Friedman, raw scales",
    "mixed table, embeddings, classes",
    "denoising conv autoencoder, shapes",
    "conv net, shapes",
    "separable conv net with BN, digits",
    "vision transformer, shapes",
    "GPT, English",
    "Llama, code",
    "GRU, Lorenz series",
    "PINN, Helmholtz",
    "PINN, Allen-Cahn",
    "two towers, implicit feedback",
    "click prediction, products of fields",
    "GPT with LoRA, from code to English",
)
