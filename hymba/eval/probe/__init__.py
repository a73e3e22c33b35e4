"""What the heads of a trained model do: `hymba probe MODEL --out folder`."""
