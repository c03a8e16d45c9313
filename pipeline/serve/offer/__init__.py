"""What a server offers: models from run folders or a serve file, and the engines behind them."""
