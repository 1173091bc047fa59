"""Key management systems: who holds the root, behind one small interface (`filigrane.kms.base`)."""
