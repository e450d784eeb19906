-- resolution: 256
--
-- So many images of each source, chosen by chance. A source is the name of a shard without the number at its end; a source that is
-- not listed is taken whole. The choice looks at the uid alone: it is the same every time, and no score decides.
--
-- A source with many AI-generated images goes whole (HunyuanImage 3 does the same), for what is not found in it is of their kind. Its
-- share is what real_share <= 0.05 flags, shrunk to 5 % (the share of real images that is flagged) as if 20 more images were there,
-- so that three flagged images of ten do not condemn a source.
WITH quotas(source, quota) AS (VALUES
  ('pictures', 100000),
  ('scans', 20000)
),
sources AS (
  SELECT uid, regexp_replace(shard, '[-_.]*[0-9]+$', '') AS source FROM basics
),
sizes AS (
  SELECT source, count(*) AS num_images, (1 + count(*) FILTER (real_share <= 0.05)) / (20 + count(real_share)) AS ai_share
  FROM sources LEFT JOIN synthetic USING (uid) GROUP BY source
)
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  duplicates.representative AS not_duplicate, -- 1: of files that show the same picture, also mirrored, one stays
  -- md5_number_upper is between 0 and 2^64, evenly: about `quota` of a source's `num_images` are below their share of it.
  coalesce(md5_number_upper(basics.uid) / 18446744073709551616.0 * num_images < quota, true) AS in_quota, -- 1: no source drowns the others
  ai_share <= 0.3 OR missing('synthetic') AS source_not_synthetic -- 5: a source of generated images goes whole
FROM basics
LEFT JOIN duplicates USING (uid)
LEFT JOIN sources USING (uid)
LEFT JOIN sizes USING (source)
LEFT JOIN quotas USING (source)
