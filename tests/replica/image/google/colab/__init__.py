"""What AutoSloth asks of google.colab, played: no secret is there, and Drive is a folder."""
