"""What a recurrent model is: the equations, the weights, and where both come from."""
