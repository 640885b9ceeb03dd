"""What every part needs: options, metrics, CRF, transforms, reports. Imports nothing of ours and no torch."""
