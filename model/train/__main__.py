"""`python -m model.train` trains a model directory."""

from model.train.train import main

if __name__ == "__main__":
    main()
